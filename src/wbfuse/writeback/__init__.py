"""The policy: log -> extent map -> generations -> commit. It knows a store and no kernel."""

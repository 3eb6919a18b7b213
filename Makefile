# Every target sets up what it needs on a Debian 12 machine (as root; else the Debian packages must be there).
PYTHON ?= /usr/bin/python3
VENV := .venv
PY := $(VENV)/bin/python
APT := python3-venv fuse3 libfuse3-dev pkg-config gcc libc6-dev fio e2fsprogs mount util-linux postgresql qemu-utils qemu-system-x86 iproute2
BENCH_APT := s3fs openssh-server openssh-client

.PHONY: setup demo test torture lint bench clean

setup: $(VENV)/.done

$(VENV)/.debian: Makefile
	@mkdir -p $(VENV)
	@for p in $(APT); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	  else echo "missing Debian packages:$$missing (install them as root: apt-get install$$missing)"; exit 1; fi; fi
	@touch $@

$(VENV)/.done: pyproject.toml $(VENV)/.debian
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(PY) -m wbfuse.cli.demo

test: setup $(VENV)/guest/.done $(VENV)/azurite/.done
	$(PY) -m pytest

# The long runs of what `make test` does in small.
torture: setup $(VENV)/machine/.done
	$(PY) -m pytest --timeout 3600 torture
	$(PY) -m tests.simulation 0 10000
	WBFUSE_NAMES=5000 $(PY) -m pytest --timeout 3600 tests/test_renames.py
	WBFUSE_FUZZ=5000 $(PY) -m pytest --timeout 3600 tests/test_fuzz.py
	WBFUSE_KILLS=200 $(PY) -m pytest --timeout 3600 tests/test_keeper.py tests/test_disk_log.py tests/test_failing_stores.py
	WBFUSE_FSX_OPERATIONS=200000 $(PY) -m pytest --timeout 3600 tests/test_exerciser.py

# A kernel and a shell for a virtual machine that boots from an image on a mount: unpacked here, not installed.
GUEST := apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*-cloud-amd64\)$$/\1/p'
$(VENV)/guest/.done: Makefile
	rm -rf $(VENV)/guest && mkdir -p $(VENV)/guest
	@if [ "$$(id -u)" = 0 ]; then apt-get update -qq; fi
	cd $(VENV)/guest && apt-get download -q $$($(GUEST)) busybox-static && for p in *.deb; do dpkg -x $$p .; done
	rm -rf $(VENV)/guest/*.deb $(VENV)/guest/lib $(VENV)/guest/usr
	@touch $@

# A small Debian for a virtual machine that runs wbfuse itself.
$(VENV)/machine/.done: Makefile
	rm -rf $(VENV)/machine && mkdir -p $(VENV)/machine
	@if [ "$$(id -u)" = 0 ]; then apt-get update -qq; apt-get install -y -qq --no-install-recommends debootstrap; fi
	debootstrap --variant=minbase --include=python3,fuse3,kmod,diffutils bookworm $(VENV)/machine/root > $(VENV)/machine/log
	cd $(VENV)/machine && apt-get download -q $$($(GUEST)) && for p in *.deb; do dpkg -x $$p kernel; done
	cp -a $(VENV)/machine/kernel/boot $(VENV)/machine/kernel/lib $(VENV)/machine/root/usr/ # its /lib is a link to usr/lib
	rm -rf $(VENV)/machine/*.deb $(VENV)/machine/kernel $(VENV)/machine/root/var/cache/apt
	chroot $(VENV)/machine/root /usr/sbin/depmod $$(basename $(VENV)/machine/root/lib/modules/*)
	@touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Microsoft's own server of Azure's blobs, for tests.
$(VENV)/azurite/.done: Makefile $(VENV)/.done
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3.35.0
	@touch $@

bench: setup $(VENV)/.bench
	$(PY) -m bench

$(VENV)/.bench: Makefile
	@if [ "$$(id -u)" = 0 ]; then apt-get install -y -qq --no-install-recommends $(BENCH_APT); fi
	@touch $@

clean:
	rm -rf $(VENV) build

# The developer's commands: `make` lists them. Everything lives in .venv; nothing is installed outside of it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
EXTRAS := device,workshop,data,ray,publish,demo,dev
# llama.cpp is compiled once and pip keeps the wheel. Its picture and sound part and its `common` library are left out:
# half of what there is to compile.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/tools/llama_only.cmake

WEB := src/pitstop/device/web
# program:Debian package
WEB_NEEDS := chromium:chromium em++:emscripten cmake:cmake ninja:ninja-build patch:patch node:nodejs npm:npm \
	WebKitWebDriver:webkit2gtk-driver Xvfb:xvfb

.PHONY: help venv demo web test test-web test-boards lint types bench clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

venv: .venv/.installed ## make .venv with everything, in the tested versions

.venv/.installed: pyproject.toml tools/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "Python cannot make a venv: apt-get install python3-venv (on Debian), then again"; exit 1; }
	@command -v $(or $(CXX),g++) >/dev/null || { echo "a C++ compiler is needed for llama.cpp: apt-get install g++ (on Debian), then again"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "compiling llama.cpp (some 2 minutes on 2 cores, once) while the rest is installed"
	$(PIP) wheel --quiet --no-deps --wheel-dir .venv/wheels -c tools/constraints.txt llama-cpp-python & compile=$$!; \
	$(PIP) install --quiet -c tools/constraints.txt -e ".[serve,workshop,data,ray,publish,dev]" && wait $$compile
	$(PIP) install --quiet -c tools/constraints.txt --find-links .venv/wheels -e ".[$(EXTRAS)]"
	@touch $@

demo: venv ## the whole way on a real small model, no GPU
	$(BIN)/pitstop demo

web: venv $(WEB)/node_modules/.package-lock.json ## the page for phones, into $(WEB)/dist
	$(BIN)/python tools/build_web_engine.py
	npm --prefix $(WEB) run --silent build

$(WEB)/node_modules/.package-lock.json: $(WEB)/package-lock.json
	@command -v npm >/dev/null || { echo "npm is needed: apt-get install nodejs npm (on Debian), then again"; exit 1; }
	npm --prefix $(WEB) ci

test: venv ## all tests but those of the two below, a file at a time on each of two processes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25 -m "not web and not board"

test-web: ## the page in Chromium and WebKit; installs what that needs (as root, on Debian)
	@$(foreach pair,$(WEB_NEEDS),command -v $(firstword $(subst :, ,$(pair))) >/dev/null || missing="$$missing $(lastword $(subst :, ,$(pair)))";) \
	[ -z "$$missing" ] || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; }
	$(MAKE) web
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/device/web tests/device/page

test-boards: venv ## the device side on aarch64, under qemu (as root, on Debian, some 5 minutes the first time)
	@command -v qemu-aarch64-static debootstrap aarch64-linux-gnu-g++ cmake >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends qemu-user-static debootstrap g++-aarch64-linux-gnu cmake; }
	$(BIN)/pytest -m board

lint: venv ## style and import rules
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/lint-imports

types: venv ## mypy, strict
	$(BIN)/mypy

bench: web ## every benchmark beside its peer but that of tables (hours), into bench/*.json
	@mkdir -p bench && for script in $(filter-out tools/bench_tables.py,$(wildcard tools/bench_*.py)); do $(BIN)/python $$script --json bench/$$(basename $$script .py).json || exit 1; done

clean: ## remove .venv and the caches; runs, bases and the demo's folder stay
	rm -rf .venv .*_cache .hypothesis dist; find src tests tools -name __pycache__ -prune -exec rm -rf {} +

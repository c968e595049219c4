# On a machine with an NVIDIA GPU: builds, checks every CUDA kernel, times it, writes benchmarks/results/gpu-*.json.
PYTHON ?= .venv/bin/python
GPU_SECONDS ?= 1500

.PHONY: gpu
gpu:
	$(PYTHON) benchmarks/gpu.py --seconds $(GPU_SECONDS)

"""The main job on real input: a small residual network on handwritten digits, quantized and measured."""

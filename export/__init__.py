"""Stage 1: modules -> ONNX -> engines, with a manifest of what was built from what."""

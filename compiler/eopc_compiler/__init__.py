"""eopc compiler: turns a LLaMA-family checkpoint into a bundle of energy-priced ONNX tiers."""

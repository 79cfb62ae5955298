"""Training-time sparsity for PyTorch: sparsify a model, train it as before, audit it, export 2:4 ONNX."""

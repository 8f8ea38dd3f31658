"""An ONNX file as a network of the library."""

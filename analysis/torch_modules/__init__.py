"""PyTorch modules as they are: what one training step of them keeps and computes, asked of PyTorch itself."""

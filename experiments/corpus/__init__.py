"""Which networks of torchvision, timm, transformers and peft are predicted, and how exactly."""

"""Networks with adapters of peft: LoRA beside frozen layers, as peft makes them."""

from __future__ import annotations

from typing import Any

RANK = 4
DROPOUT = 0.1


def with_lora(module: Any, kinds: tuple[type, ...], dropout: float = DROPOUT) -> Any:
    """LoRA of rank 4 beside every layer of these kinds."""
    import peft

    targets = [path for path, part in module.named_modules() if isinstance(part, kinds)]
    return peft.get_peft_model(module, peft.LoraConfig(r=RANK, target_modules=targets, lora_dropout=dropout))


def resnet18() -> Any:
    """LoRA on every convolution."""
    import torch
    import torchvision

    return with_lora(torchvision.models.resnet18(num_classes=10), (torch.nn.Conv2d,))


def mobilenet_v2() -> Any:
    """LoRA on every convolution without groups."""
    import peft
    import torch
    import torchvision

    module = torchvision.models.mobilenet_v2(num_classes=10)
    parts = module.named_modules()
    targets = [path for path, part in parts if isinstance(part, torch.nn.Conv2d) and part.groups == 1]
    return peft.get_peft_model(module, peft.LoraConfig(r=RANK, target_modules=targets))


def bert() -> Any:
    """LoRA on queries and values, and a classifier that trains as a whole."""
    import peft
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    adapters = peft.LoraConfig(r=RANK, target_modules=["query", "value"], modules_to_save=["classifier"])
    return peft.get_peft_model(BertForSequenceClassification(config), adapters)


def gpt2() -> Any:
    """LoRA on the layers that make queries, keys and values; segments of the network run twice."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    module.gradient_checkpointing_enable({"use_reentrant": False})
    return peft.get_peft_model(module, peft.LoraConfig(r=RANK, target_modules=["c_attn"], fan_in_fan_out=True))

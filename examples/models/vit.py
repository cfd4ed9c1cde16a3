"""The vision transformer ViT-S/16 (Dosovitskiy et al., 2021; the small size of Touvron et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PATCH = 16
WIDTH = 384
DEPTH = 12
HEADS = 6
LAYER_NORM_EPS = 1e-6
INITIAL_STD = 0.02
CLASS_TOKEN_STD = 1e-6


class VisionTransformer(nn.Module):
    """Patches of 16x16 pixels and a class token, learned positions, twelve pre-norm blocks; no dropout.

    Raises:
        ValueError: ``size`` is no multiple of 16 pixels.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        if size % PATCH:
            raise ValueError(f"vit-s16 needs images of a multiple of {PATCH} pixels a side, got {size}")
        tokens = (size // PATCH) ** 2 + 1
        self.class_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, tokens, WIDTH))
        self.patches = nn.Conv2d(channels, WIDTH, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPS)
        self.classifier = nn.Linear(WIDTH, classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.class_token, std=CLASS_TOKEN_STD)
        nn.init.trunc_normal_(self.positions, std=INITIAL_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.classifier(self.norm(self.blocks(tokens + self.positions))[:, 0])


class Block(nn.Module):
    """Self-attention with queries, keys and values from one matrix, then two layers with GELU between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def attention(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.projection(heads.transpose(1, 2).flatten(2))

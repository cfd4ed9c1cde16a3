"""Named sets of train.py's options: the demonstration, and the paper's trainings (tables 7 and 8, sections 3.1, A.6).

Where the paper's text and its tables differ (section 3.1: batch 128 and weight decay 1e-4 for all), the tables hold. It
names neither momentum, label smoothing nor warm-up: these recipes have 0.9, none and none, as the authors' code has.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any

Recipe = dict[str, Any]

# What all have in common. Appendix A.7: cosine decay; table 1: three seeds.
COMMON: Recipe = {
    "label_noise": 0.0,
    "label_smoothing": 0.0,
    "lr_schedule": "cosine",
    "lr_warmup": 0.0,
    "momentum": 0.9,
    "mask": "tensor",
    "gamma_warmup": 0.0,
    "seeds": 3,
}
# Table 7, and section 3.1 for beta and gamma. rho has no part in SGD but in the sharpness that is reported for it.
CIFAR: dict[str, Recipe] = {
    "resnet18": {"epochs": 200, "batch_size": 128, "lr": 0.05, "rho": 0.05, "beta": 0.6, "gamma": 0.5},
    "wrn28-10": {"epochs": 200, "batch_size": 256, "lr": 0.05, "rho": 0.1, "beta": 0.5, "gamma": 0.5},
    "pyramidnet110": {"epochs": 300, "batch_size": 256, "lr": 0.1, "rho": 0.2, "beta": 0.6, "gamma": 0.5},
}
# Of SGD, and of SAM and ESAM.
CIFAR_WEIGHT_DECAY = {"resnet18": (5e-4, 1e-3), "wrn28-10": (5e-4, 1e-3), "pyramidnet110": (5e-4, 5e-4)}
# Table 8, whose "ResNet-110" is the ResNet-101 of the text; section 3.1 for beta, gamma and m, the size of the parts of
# a batch that are perturbed each by itself. A.6 says of ViT-S/16 only that it shares ResNet-50's hyperparameters, with
# beta = 0.5: the rest of its recipe is ResNet-50's.
TABLE_8: Recipe = {"epochs": 90, "batch_size": 512, "lr": 0.2, "weight_decay": 1e-4, "rho": 0.05, "gamma": 0.7}
IMAGENET: dict[str, Recipe] = {
    "resnet50": {**TABLE_8, "beta": 0.6},
    "resnet101": {**TABLE_8, "beta": 0.6},
    "vit-s16": {**TABLE_8, "beta": 0.5},
}
M_SHARPNESS = 128
OPTIMIZERS = ("sgd", "sam", "esam", "esam-swp", "esam-sds", "esam-fast")
# Not the paper's: pass 1 takes a quarter of the batch, pass 2 all of it (docs/which_mode.md).
FAST: Recipe = {"optimizer": ["esam"], "beta": 1.0, "gamma": 1.0, "ascent_share": 0.25}

# What `make train` runs. With batches of 64 digits a part of a batch would cost far more than its share, since every
# call has its price whatever its size. 270: the 1,347 training digits are five batches of nearly the same size. The
# radius is that at which SAM is most accurate on other seeds (demo_study.py).
DEMO: Recipe = {
    "data": "digits",
    "model": "cnn",
    **FAST,
    "optimizer": ["sgd", "sam", "esam"],
    "rho": 0.05,
    "lr_schedule": "cosine",
    "batch_size": 270,
    "epochs": 40,
    "seeds": 3,
}


def all_recipes() -> dict[str, Recipe]:
    """Options by name: ``demo``, ``esam-fast``, and ``<data>-<model>-<optimizer>`` for the paper's."""
    recipes = {}
    for optimizer in OPTIMIZERS:
        for model, numbers in CIFAR.items():
            decay = {"weight_decay": CIFAR_WEIGHT_DECAY[model][optimizer != "sgd"]}
            for data in ("cifar10", "cifar100"):
                recipes[f"{data}-{model}-{optimizer}"] = recipe(data, model, optimizer, {**numbers, **decay})
        for model, numbers in IMAGENET.items():
            parts = {} if optimizer == "sgd" else {"micro_batch": M_SHARPNESS}
            recipes[f"imagenet-{model}-{optimizer}"] = recipe("imagenet", model, optimizer, {**numbers, **parts})
    return {"demo": DEMO, "esam-fast": FAST, **dict(sorted(recipes.items()))}


def recipe(data: str, model: str, optimizer: str, numbers: Recipe) -> Recipe:
    """One recipe; beta and gamma only where the optimizer has them."""
    both = ("beta", "gamma")
    shares = {"esam": both, "esam-swp": ("beta",), "esam-sds": ("gamma",)}.get(optimizer, ())
    kept = {name: value for name, value in numbers.items() if name not in ("beta", "gamma") or name in shares}
    mode = FAST if optimizer == "esam-fast" else {"optimizer": [optimizer]}
    return {"data": data, "model": model, **mode, **COMMON, **kept}


RECIPES = all_recipes()


def recipe_name(text: str) -> str:
    """``text``, if it names a recipe or asks for the list."""
    if text != "list" and text not in RECIPES:
        close = difflib.get_close_matches(text, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else "--recipe list names them"
        raise argparse.ArgumentTypeError(f"no recipe {text}: {hint}")
    return text


def parse_with_recipe(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options given; those not given from the recipe, if one is named, or else the parser's defaults."""
    options = parser.parse_args(arguments)
    if options.recipe == "list":
        print(listing())
        sys.exit(0)
    if options.recipe is None:
        return options
    parser.set_defaults(**RECIPES[options.recipe])
    return parser.parse_args(arguments)


def listing() -> str:
    """A line for each recipe: its name, and the options in which they differ."""
    columns = ("epochs", "batch_size", "lr", "weight_decay", "rho", "beta", "gamma", "micro_batch")
    lines = [("recipe", *(name.replace("_", "-") for name in columns))]
    for name, recipe in RECIPES.items():
        values = (recipe.get(column) for column in columns)
        lines.append((name, *("-" if value is None else f"{value:g}" for value in values)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

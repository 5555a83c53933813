"""The Vision Transformers: ViT-Ti for 32×32 images as in the paper's comparison, and one that a laptop's CPU can train."""

from functools import partial

from transformers import ViTConfig, ViTForImageClassification

from tasks.image_classification.catalogue import DATASETS
from tasks.image_classification.pixels import accept_bytes


# hidden, layers, heads, MLP
SIZES = {"vit-ti": (192, 12, 3, 768), "vit-small": (64, 4, 4, 128)}


def build(name: str, dataset: str, dropout: float = 0.0) -> ViTForImageClassification:
    """
    A new ViT for a data set's images, in its patches: 4×4 for 32×32 images, 7×7 for 28×28, 2×2 for 8×8.

    `vit-ti` is the ViT-Ti of Zhao et al. 2022 ("Penalizing Gradient Norm", whose settings the XSAM paper follows): 192 wide,
    12 layers, 3 heads, MLP 768; 5.38 M parameters for 100 classes. `vit-small` is 64 wide and has 4 layers. Both take bytes, and
    floats that are normalised.

    Raises:
        `ValueError`: there is no such model.
    """
    if name not in SIZES:
        raise ValueError(f"`model` is {name!r}: choose one of {', '.join(SIZES)}.")
    hidden, layers, heads, mlp = SIZES[name]
    images = DATASETS[dataset]
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
            hidden_dropout_prob=dropout,
            # Xavier's variance for square matrices, as in the ViT of Zhao et al.; Transformers' 0.02 is made for widths of 768
            # and leaves one of 64 on a plateau.
            initializer_range=hidden**-0.5,
            image_size=images.size,
            patch_size=images.patch,
            num_channels=len(images.mean),
            num_labels=images.classes,
        )
    )
    # By default transformers gives a saved ViT the weight names of its older versions, and the Trainer, which reads a
    # checkpoint without translating them back, would resume with random weights (transformers issue 43701).
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    accept_bytes(model, images)
    return model

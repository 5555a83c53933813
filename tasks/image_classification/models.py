"""The models: those of the paper's tables, and a ViT and a residual CNN that a laptop's CPU can train."""

from functools import partial
from pathlib import Path

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from tasks.image_classification.catalogue import DATASETS, Images
from tasks.image_classification.cnns import CNNS, CNNConfig, CNNForImageClassification
from tasks.image_classification.pixels import accept_bytes


VITS = {"vit-ti": (192, 12, 3, 768), "vit-small": (64, 4, 4, 128)}  # hidden, layers, heads, MLP
RESNETS = {"resnet-small": (8, 16, 32)}  # channels of the stages
MODELS = (*VITS, *RESNETS, *CNNS)


class SmallResNetForImageClassification(ResNetForImageClassification):
    """
    Transformers' ResNet with the stem for small images of He et al. 2016 (arXiv:1512.03385, section 4.2): a 3×3 convolution and
    no pooling. ImageNet's would leave 2×2 of an 8×8 image. Images of more than 16 pixels (`config.image_size`) are halved by it.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, stride=1 if config.image_size <= 16 else 2
        )
        stem.pooler = nn.Identity()
        self.post_init()


def load(folder: Path) -> PreTrainedModel:
    """A trained model, from the folder that `train.py` saved it in; it takes pixels that are normalised."""
    kind = AutoConfig.from_pretrained(folder).architectures
    small = SmallResNetForImageClassification
    return (small if kind == [small.__name__] else AutoModelForImageClassification).from_pretrained(folder)


def build(name: str, dataset: str, dropout: float = 0.0) -> PreTrainedModel:
    """
    A new model for a data set's images.

    `vit-ti` is the ViT-Ti of Zhao et al. 2022 ("Penalizing Gradient Norm", whose settings the XSAM paper follows): 192 wide,
    12 layers, 3 heads, MLP 768; 5.38 M parameters for 100 classes. `vit-small` is 64 wide and has 4 layers. Patches are 4×4 for
    32×32 images, 7×7 for 28×28, 2×2 for 8×8. `resnet-small` is a [`SmallResNetForImageClassification`] of three stages of one
    basic block, with 8, 16 and 32 channels: 20 thousand parameters. The others are torchvision's, see
    [`CNNForImageClassification`]. All take bytes, and floats that are normalised.

    Raises:
        `ValueError`: there is no such model, the images are too small for it, or dropout is asked of one that has none to set.
    """
    if name not in MODELS:
        raise ValueError(f"`model` is {name!r}: choose one of {', '.join(MODELS)}.")
    images = DATASETS[dataset]
    if dropout and name not in VITS:
        raise ValueError(
            f"`dropout` is {dropout}, and {name} has no dropout to set: leave it out, or choose one of {', '.join(VITS)}."
        )
    model: PreTrainedModel
    if name in VITS:
        model = _vit(name, images, dropout)
    elif name in RESNETS:
        model = _resnet(name, images)
    else:
        model = _cnn(name, images)
    accept_bytes(model, images)
    return model


def _cnn(name: str, images: Images) -> CNNForImageClassification:
    return CNNForImageClassification(
        CNNConfig(architecture=name, image_size=images.size, num_channels=images.channels, num_labels=images.classes)
    )


def _resnet(name: str, images: Images) -> ResNetForImageClassification:
    channels = RESNETS[name]
    return SmallResNetForImageClassification(
        ResNetConfig(
            num_channels=images.channels,
            embedding_size=channels[0],
            hidden_sizes=list(channels),
            depths=[1] * len(channels),
            layer_type="basic",
            image_size=images.size,
            num_labels=images.classes,
        )
    )


def _vit(name: str, images: Images, dropout: float) -> ViTForImageClassification:
    hidden, layers, heads, mlp = VITS[name]
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
            num_channels=images.channels,
            num_labels=images.classes,
        )
    )
    # By default transformers gives a saved ViT the weight names of its older versions, and the Trainer, which reads a
    # checkpoint without translating them back, would resume with random weights (transformers issue 43701).
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    return model

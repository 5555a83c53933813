"""torchvision's CNNs as Hugging Face models: in their ImageNet form, or in the form for small images of the paper's tables."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import models
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


SMALL = 64  # Images of at most so many pixels are small.


class CNNConfig(PreTrainedConfig):
    """
    Which of the [`CNNS`], for which images.

    Args:
        architecture (`str`): a name of `CNNS`.
        image_size (`int`): edge of an image in pixels; up to `SMALL` the form for small images.
        num_channels (`int`): of an image.
    """

    model_type = "torchvision-cnn"
    architecture: str = "resnet-18"
    image_size: int = 32
    num_channels: int = 3


def _resnet(make: Callable[..., models.ResNet], config: CNNConfig) -> nn.Module:
    network = make(num_classes=config.num_labels)
    network.conv1 = _stem(network.conv1, config)
    if config.image_size <= SMALL:
        network.maxpool = nn.Identity()
    return network


def _densenet(config: CNNConfig) -> nn.Module:
    network = models.densenet121(num_classes=config.num_labels)
    network.features.conv0 = _stem(network.features.conv0, config)
    if config.image_size <= SMALL:
        # Huang et al. 2017 (arXiv:1608.06993, section 4.2): on CIFAR a convolution alone comes before the first block.
        for name in ("norm0", "relu0", "pool0"):
            setattr(network.features, name, nn.Identity())
    return network


def _vgg(hidden: int | None, config: CNNConfig) -> nn.Module:
    if config.image_size < 32:
        raise ValueError(
            f"VGG-11 halves an image five times, and this one has {config.image_size} pixels: choose another `model`."
        )
    network = models.vgg11_bn(num_classes=config.num_labels)
    if config.image_size <= SMALL:
        network.features[0] = nn.Conv2d(config.num_channels, 64, 3, padding=1)
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        if hidden is None:
            network.classifier = nn.Linear(512, config.num_labels)
        else:
            network.classifier[0] = nn.Linear(512, hidden)
    return network


def _stem(convolution: nn.Conv2d, config: CNNConfig) -> nn.Conv2d:
    """Of 3×3 and stride 1 for small images, where ImageNet's of 7×7 and stride 2 would leave little of them."""
    if config.image_size > SMALL:
        return convolution
    return nn.Conv2d(config.num_channels, convolution.out_channels, 3, padding=1, bias=False)


CNNS: dict[str, Callable[[CNNConfig], nn.Module]] = {
    "resnet-18": lambda config: _resnet(models.resnet18, config),
    "resnet-50": lambda config: _resnet(models.resnet50, config),
    "densenet-121": _densenet,
    # With one layer after the convolutions, as the field reports it, and with the three of the paper's code.
    "vgg-11": lambda config: _vgg(None, config),
    "vgg-11-mlp": lambda config: _vgg(4096, config),
}


class CNNForImageClassification(PreTrainedModel):
    """
    One of the [`CNNS`] with the interface of a Hugging Face model.

    In the form for small images all layers start as torch's do, which is how the paper's code starts them; in ImageNet's form as
    torchvision's do.

    Args:
        config ([`CNNConfig`]): which one.

    Raises:
        `ValueError`: the images are too small for it.
    """

    config_class = CNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CNNConfig):
        super().__init__(config)
        self.network = CNNS[config.architecture](config)
        if config.image_size <= SMALL:
            self.network.apply(_start_afresh)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # they have been, one by one

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """Logits (B, classes) of images (B, C, H, W), and their mean cross-entropy if labels (B,) are given."""
        logits = self.network(pixel_values)
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def _start_afresh(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


AutoConfig.register(CNNConfig.model_type, CNNConfig)
AutoModelForImageClassification.register(CNNConfig, CNNForImageClassification)

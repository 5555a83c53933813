"""The CNNs of the paper's tables: their sizes as the field reports them, their forms, their start, and what is saved of them."""

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models
from transformers import AutoModelForImageClassification

from tasks.image_classification import models
from tasks.image_classification.cnns import CNNConfig, CNNForImageClassification


def on_meta(name, size=32, classes=10):
    """A model without memory or values."""
    with torch.device("meta"):
        return CNNForImageClassification(CNNConfig(architecture=name, image_size=size, num_labels=classes))


@pytest.mark.parametrize(
    "name, size, classes, parameters",
    [
        # kuangliu/pytorch-cifar's ResNet-18, DenseNet-121 and VGG-11 have exactly as many.
        ("resnet-18", 32, 10, 11_173_962),
        ("resnet-18", 32, 100, 11_220_132),
        ("densenet-121", 32, 10, 6_956_298),
        ("vgg-11", 32, 10, 9_231_114),
        # Three layers: 512·4096 + 4096, 4096² + 4096, 4096·10 + 10, instead of 512·10 + 10.
        ("vgg-11-mlp", 32, 10, 9_231_114 - 5130 + 2_101_248 + 16_781_312 + 40_970),
        ("resnet-50", 224, 1000, 25_557_032),  # torchvision's table of models
    ],
)
def test_parameter_counts_are_those_of_the_field(name, size, classes, parameters):
    model = on_meta(name, size, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, size, size, device="meta")).logits.shape == (2, classes)


def test_small_images_stay_large_enough():
    seen = {}
    for name, last in (("resnet-18", "layer4"), ("densenet-121", "features"), ("vgg-11", "features")):
        for size in (32,) if name == "densenet-121" else (32, 64):
            model = on_meta(name, size)
            model.network.get_submodule(last).register_forward_hook(
                lambda *call, key=(name, size): seen.update({key: tuple(call[2].shape[2:])})
            )
            model(torch.zeros(1, 3, size, size, device="meta"))
    assert seen == {
        **{("resnet-18", size): (size // 8,) * 2 for size in (32, 64)},
        ("densenet-121", 32): (4, 4),
        **{("vgg-11", size): (size // 32,) * 2 for size in (32, 64)},
    }
    with pytest.raises(ValueError, match="halves an image five times, and this one has 28 pixels"):
        models.build("vgg-11", "fashion_mnist")
    with pytest.raises(ValueError, match="`dropout` is 0.1, and resnet-18 has no dropout to set"):
        models.build("resnet-18", "cifar10", 0.1)


def test_a_small_form_starts_as_torchs_layers_do_and_imagenets_as_torchvisions():
    small = models.build("resnet-18", "cifar10").network.layer4[1].conv2.weight
    bound = (1 / (512 * 9)) ** 0.5  # uniform in ±1/√fan_in, a standard deviation of 1/√3 of that
    assert small.abs().max() <= bound and small.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    torch.manual_seed(3)
    large = CNNForImageClassification(CNNConfig(architecture="resnet-18", image_size=224, num_labels=10))
    torch.manual_seed(3)
    theirs = torchvision_models.resnet18(num_classes=10)
    assert all(torch.equal(a, b) for a, b in zip(large.parameters(), theirs.parameters(), strict=True))


def test_the_loss_is_the_mean_cross_entropy_and_what_is_saved_is_the_same(tmp_path):
    model = models.build("resnet-18", "digits").eval()
    pixels, labels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([3, 1, 4, 1])
    found = model(pixel_values=pixels, labels=labels)
    assert found.loss.item() == pytest.approx(nn.functional.cross_entropy(found.logits, labels).item())
    assert model(pixel_values=pixels).loss is None
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    floats = torch.randn(4, 1, 8, 8)
    assert isinstance(again, CNNForImageClassification) and torch.equal(model(floats).logits, again(floats).logits)

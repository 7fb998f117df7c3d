"""torchvision's ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", 2016)."""
from torch import nn

from plumbing.errors import InputError


class ResNet50(nn.Module):
    """torchvision's ResNet-50 up to its last stage, with the names of its weights."""

    FAMILY = "ResNet-50"
    FEATURES = ("layer4",)

    def __init__(self, patch_size=32, dim=2048):
        super().__init__()
        try:
            from torchvision.models import resnet50  # here, so that ViTs do not need torchvision
        except ImportError as error:
            raise InputError(f"torchvision cannot be imported ({error}); pip install torchvision, "
                             "or take an encoder that is no ResNet-50") from None
        for name, layer in resnet50().named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, layer)

    def feature_map(self, x, feature):
        """Images [B, 3, H, W], normalised -> [B, 2048, H / 32, W / 32]. There is one feature."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

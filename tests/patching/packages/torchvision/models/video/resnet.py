"""Stands for torchvision's networks for clips, of a width that tests have time for."""

from torch import nn


class Conv3DSimple(nn.Conv3d):
    def __init__(self, in_planes, out_planes, midplanes=None, stride=1, padding=1):
        super().__init__(in_planes, out_planes, 3, stride, padding, bias=False)

    @staticmethod
    def get_downsample_stride(stride):
        return stride, stride, stride


class Conv3DNoTemporal(nn.Conv3d):
    def __init__(self, in_planes, out_planes, midplanes=None, stride=1, padding=1):
        strides, paddings = (1, stride, stride), (0, padding, padding)
        super().__init__(in_planes, out_planes, (1, 3, 3), strides, paddings, bias=False)

    @staticmethod
    def get_downsample_stride(stride):
        return 1, stride, stride


class Conv2Plus1D(nn.Sequential):
    def __init__(self, in_planes, out_planes, midplanes, stride=1, padding=1):
        super().__init__(
            Conv3DNoTemporal(in_planes, midplanes, None, stride, padding),
            nn.BatchNorm3d(midplanes),
            nn.ReLU(inplace=True),
            nn.Conv3d(
                midplanes, out_planes, (3, 1, 1), (stride, 1, 1), (padding, 0, 0), bias=False
            ),
        )

    get_downsample_stride = staticmethod(Conv3DSimple.get_downsample_stride)


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, conv_builder, stride=1, downsample=None):
        super().__init__()
        midplanes = inplanes * planes * 27 // (inplanes * 9 + 3 * planes)
        self.conv1 = nn.Sequential(
            conv_builder(inplanes, planes, midplanes, stride),
            nn.BatchNorm3d(planes),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(conv_builder(planes, planes, midplanes), nn.BatchNorm3d(planes))
        self.relu, self.downsample = nn.ReLU(inplace=True), downsample

    def forward(self, x):
        out = self.conv2(self.conv1(x))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class BasicStem(nn.Sequential):
    def __init__(self, planes):
        conv = nn.Conv3d(3, planes, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        super().__init__(conv, nn.BatchNorm3d(planes), nn.ReLU(inplace=True))


class VideoResNet(nn.Module):
    def __init__(self, conv_makers, width=8, num_classes=5):
        super().__init__()
        self.stem = BasicStem(width)
        inplanes = width
        for index, maker in enumerate(conv_makers):
            planes, stride = width * 2**index, 1 if index == 0 else 2
            downsample = None
            if stride != 1:
                strides = maker.get_downsample_stride(stride)
                conv = nn.Conv3d(inplanes, planes, 1, strides, bias=False)
                downsample = nn.Sequential(conv, nn.BatchNorm3d(planes))
            blocks = [BasicBlock(inplanes, planes, maker, stride, downsample)]
            blocks.append(BasicBlock(planes, planes, maker))
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            inplanes = planes
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(inplanes, num_classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(self.avgpool(x).flatten(1))


def r3d_18():
    return VideoResNet([Conv3DSimple] * 4)


def mc3_18():
    return VideoResNet([Conv3DSimple] + [Conv3DNoTemporal] * 3)


def r2plus1d_18():
    return VideoResNet([Conv2Plus1D] * 4)

from importlib.metadata import PackageNotFoundError, version

from drifting_pytorch.drifting import (
    BackboneFeatures,
    ConvGenerator,
    ConvNeXtFeatures,
    DriftField,
    DriftingGenerator,
    FeatureDriftLoss,
    GradientField,
    ImageFolder,
    LatentMAE,
    MAETrainer,
    SampleQueue,
    SharpField,
    SinkhornField,
    Trainer,
    drift_loss,
    plain_drift_loss,
)

try:
    __version__ = version('drifting-pytorch')
except PackageNotFoundError:        # the folder alone, copied
    __version__ = 'unknown'

__all__ = [
    'BackboneFeatures',
    'ConvGenerator',
    'ConvNeXtFeatures',
    'DriftField',
    'DriftingGenerator',
    'FeatureDriftLoss',
    'GradientField',
    'ImageFolder',
    'LatentMAE',
    'MAETrainer',
    'SampleQueue',
    'SharpField',
    'SinkhornField',
    'Trainer',
    'drift_loss',
    'plain_drift_loss',
]

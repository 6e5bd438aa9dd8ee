from drifting_pytorch.drifting import (
    DriftField,
    drift_loss,
    FeatureDriftLoss,
    LatentMAE,
    ConvNeXtV2,
    BackboneFeatures,
    DriftingGenerator,
    ImageFolder,
    SampleQueue,
    Trainer,
    MAETrainer,
)

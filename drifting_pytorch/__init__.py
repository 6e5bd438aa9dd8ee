from drifting_pytorch.drifting import (
    DriftField,
    drift_loss,
    FeatureDriftLoss,
    LatentMAE,
    DriftingGenerator,
    SampleQueue,
    Trainer,
    MAETrainer,
)

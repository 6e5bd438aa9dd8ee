from drifting_pytorch.drifting import (
    DriftField,
    drift_loss,
    FeatureDriftLoss,
    DriftingGenerator,
    SampleQueue,
    Trainer,
)

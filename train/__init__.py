"""Stage two: targets from a cache or a live teacher, the loss, the trainer, and the evaluation of a student."""

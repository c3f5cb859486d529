"What one plugs into the training loops of other libraries."
from gradnb.integrations.callbacks import lightning_callback, trainer_callback

__all__ = ["lightning_callback", "trainer_callback"]

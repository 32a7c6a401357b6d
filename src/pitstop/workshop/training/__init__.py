"""How an adapter is trained: its material, the frozen weights below it, the loss, the steps and their checkpoints."""

"""What runs on the board: fetch and verify releases, keep them safe on disk, run them. No torch, no private key."""

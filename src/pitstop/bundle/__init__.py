"""The contract both sides read: what a bundle says, and bounded readers for the files it carries."""

"""pitstop: train small adapters, refuse the ones that forget, ship them signed, swap them on the device."""

__version__ = "0.1.0"

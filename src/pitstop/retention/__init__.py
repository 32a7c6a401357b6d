"""What an adapter made its base forget: suites, paired measurements, a gate with three outcomes, a report."""

"""The ground floor: configs, contracts, run folders, plug-in loading, statistics. Never imports torch."""

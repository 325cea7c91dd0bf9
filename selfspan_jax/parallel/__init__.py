"""Several devices and processes: meshes, the layout of arrays on them, collectives, and distributed runs."""

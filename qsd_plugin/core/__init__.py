"""Ground floor: errors, registries, random streams, collectives, progress and the stage runner."""

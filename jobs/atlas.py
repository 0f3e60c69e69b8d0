"""`ray job submit … -- python jobs/atlas.py`: the same as `medsae atlas`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("atlas")

"""`ray job submit … -- python jobs/measure.py`: the same as `medsae measure`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("measure")

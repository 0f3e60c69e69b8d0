"""`ray job submit … -- python jobs/architectures.py`: the same as `medsae architectures`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("architectures")

"""`ray job submit … -- python jobs/encode.py`: the same as `medsae encode`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("encode")

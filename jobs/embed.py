"""`ray job submit … -- python jobs/embed.py`: the same as `medsae embed`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("embed")

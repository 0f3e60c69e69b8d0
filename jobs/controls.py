"""`ray job submit … -- python jobs/controls.py`: the same as `medsae controls`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("controls")

"""`ray job submit … -- python jobs/panels.py`: the same as `medsae panels`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("panels")

"""`ray job submit … -- python jobs/radiographs.py`: the same as `medsae radiographs`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("radiographs")

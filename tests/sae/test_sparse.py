import itertools

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from medsae_ray.errors import InputError
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.sae.sparse import sparse_activations


@pytest.mark.parametrize("batch_size", [7, 100])
def test_equals_dense_encoding(batch_size):
    sae = ReLUSAE(SAEConfig(6, 40), seed=1)
    with torch.no_grad():
        sae.b_enc -= 0.05
    x = torch.randn(25, 6, generator=torch.Generator().manual_seed(0))
    x[4] = 0  # fires nothing: an empty row must stay a row
    indptr, neuron, value = sparse_activations(sae, x, batch_size)
    assert (indptr.dtype, neuron.dtype, value.dtype) == (np.int64, np.int32, np.float32)
    assert indptr[4] == indptr[5]
    assert (value > 0).all()
    for start, stop in itertools.pairwise(indptr):
        assert (np.diff(neuron[start:stop]) > 0).all()
    dense = csr_array((value, neuron, indptr), shape=(25, 40)).toarray()
    np.testing.assert_allclose(dense, sae.encode(x).detach().numpy(), atol=1e-6)


def test_no_rows_and_wrong_width():
    sae = ReLUSAE(SAEConfig(6, 40))
    indptr, neuron, value = sparse_activations(sae, torch.empty(0, 6))
    assert (indptr.tolist(), len(neuron), len(value)) == ([0], 0, 0)
    with pytest.raises(InputError, match="6 dimensions but these have 5"):
        sparse_activations(sae, torch.empty(3, 5))

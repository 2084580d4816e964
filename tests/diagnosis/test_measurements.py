"""Measurements with and without xarray."""

import numpy as np
import xarray as xr
from pathologies.synthetic import PLANTED, evidence

from gradjax.diagnosis import measurements


def test_median_of_infinite_seeds_is_no_nan():
    values = [[-np.inf, 1.0], [-np.inf, 3.0], [0.0, -np.inf], [0.0, 2.0]]
    ds = xr.Dataset({"x": (("seed", "i"), values)})
    np.testing.assert_array_equal(measurements.median(ds, "x"), [-np.inf, 1.5])
    assert measurements.median(ds, "absent") is None
    with_nan = xr.Dataset({"x": (("seed", "i"), [[np.nan, 1.0], [0.0, 3.0]])})
    np.testing.assert_array_equal(measurements.median(with_nan, "x"), [np.nan, 2.0])


def test_a_table_reads_as_the_dataset_it_becomes():
    over_time = PLANTED["exploding_gradients"][1]()
    for seeds in ([evidence([0.3] * 20)], [evidence([0.0] * 5), evidence([0.1] * 5)], [over_time]):
        table, ds = measurements.table(seeds), measurements.dataset(seeds)
        assert table.sizes == dict(ds.sizes) and table.attrs == ds.attrs
        for name in [*ds.data_vars, *ds.coords]:
            assert name in table
            np.testing.assert_array_equal(table[name], ds[name])
        assert "log_singular_values" not in table
        for read in (measurements.layers, measurements.product, measurements.theory):
            assert read(table) == read(ds)


def test_names_that_occur_twice_are_told_apart():
    seen = evidence([0.0] * 2)
    seen.layers[2].name = seen.layers[0].name
    names = list(measurements.table([seen])["layer"])
    assert names == ["hidden_1 (0)", "hidden_2", "hidden_1 (2)"]

"""predict_batch_udf in every way in which pyspark's is used: same columns, same refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("pyspark")

from pyspark.sql.functions import array, col, struct
from pyspark.sql.types import (
    ArrayType,
    DoubleType,
    FloatType,
    IntegerType,
    StringType,
    StructField,
    StructType,
)

from daskshare.errors import ConfigurationError
from daskshare.spark import predict_batch_udf
from tests.spark.conftest import wait_until

ROWS = 250
DATA = np.arange(4.0 * ROWS).reshape(ROWS, 4)
SCALARS = ("a", "b", "c", "d")
PAIR = StructType([StructField("a1", DoubleType()), StructField("b1", DoubleType())])
WITH_ARRAY = StructType(
    [StructField("x2", DoubleType()), StructField("y3", ArrayType(DoubleType()))]
)


@pytest.fixture(scope="module")
def scalars(spark):
    return spark.createDataFrame(pd.DataFrame(DATA, columns=list(SCALARS))).cache()


@pytest.fixture(scope="module")
def tensors(spark):
    """Four numbers in t1, and the first three of them in t2."""
    rows = {"t1": DATA.tolist(), "t2": DATA[:, :3].tolist()}
    return spark.createDataFrame(pd.DataFrame(rows)).cache()


def column(df, udf, *inputs):
    return df.select(udf(*inputs).alias("out")).toPandas()["out"].to_numpy()


def columns(df, udf, *inputs):
    return df.select(udf(*inputs).alias("out")).select("out.*").toPandas()


def make_identity():
    return lambda rows: rows


def make_row_sum():
    return lambda rows: rows.sum(axis=1)


def double(make, **options):
    return predict_batch_udf(make, return_type=DoubleType(), **{"batch_size": 5, **options})


@pytest.mark.short
@pytest.mark.parametrize("given", [struct, col, str], ids=["struct", "column", "name"])
def test_one_column_in_one_column_out(scalars, given):
    assert np.array_equal(column(scalars, double(make_identity), given("a")), DATA[:, 0])


def test_batches_of_one(scalars):
    assert np.array_equal(column(scalars, double(make_identity, batch_size=1), "a"), DATA[:, 0])


def test_several_columns_for_one_input_are_refused(scalars):
    with pytest.raises(Exception, match="Multiple input columns found, but model expected"):
        column(scalars, double(make_identity), "a", "b")


@pytest.mark.short
def test_a_struct_of_columns_is_one_input_of_rows(scalars):
    def make():
        return lambda rows: {"a1": rows[:, 0], "b1": rows[:, 1]}

    udf = predict_batch_udf(make, return_type=PAIR, batch_size=5)
    got = columns(scalars, udf, struct("a", "b"))
    assert np.array_equal(got[["a1", "b1"]].to_numpy(), DATA[:, :2])
    with pytest.raises(Exception, match="Multiple input columns found, but model expected"):
        columns(scalars, udf, "a", "b")


@pytest.mark.short
@pytest.mark.parametrize(
    "given",
    [lambda: [struct("a", "b")], lambda: [col("a"), col("b")], lambda: ["a", "b"]],
    ids=["struct", "columns", "names"],
)
def test_two_columns_for_two_inputs(scalars, given):
    def make():
        return lambda first, second: {"a1": first, "b1": second}

    udf = predict_batch_udf(make, return_type=PAIR, batch_size=5)
    assert np.array_equal(columns(scalars, udf, *given())[["a1", "b1"]].to_numpy(), DATA[:, :2])


@pytest.mark.short
@pytest.mark.parametrize("given", [struct, col, str], ids=["struct", "column", "name"])
def test_no_call_gets_more_rows_than_the_batch_size(scalars, given):
    def make():
        return lambda rows: np.full(len(rows), len(rows))

    udf = predict_batch_udf(make, return_type=IntegerType(), batch_size=10)
    sizes = column(scalars, udf, given("a"))
    assert len(sizes) == ROWS
    assert sizes.max() <= 10
    assert sizes.min() >= 1


@pytest.mark.short
def test_a_udf_keeps_its_model_and_a_new_one_loads_anew(scalars):
    def make():
        import random

        number = random.random()
        return lambda rows: np.full(len(rows), number)

    udf = double(make)
    first, again = (column(scalars, udf, struct("a")) for _ in range(2))
    # One load for all tasks of both jobs, where pyspark's has one a Python worker.
    assert len(set(first) | set(again)) == 1
    assert column(scalars, double(make), struct("a"))[0] != first[0]


def test_scalar_columns_as_one_tensor(scalars):
    expected = DATA.sum(axis=1)
    assert np.array_equal(column(scalars, double(make_row_sum), struct(*SCALARS)), expected)
    for given in ([col(name) for name in SCALARS], SCALARS):
        with pytest.raises(Exception, match="Multiple input columns found, but model expected"):
            column(scalars, double(make_row_sum), *given)
    shaped = double(make_row_sum, input_tensor_shapes=[[4]])
    assert np.array_equal(column(scalars, shaped, struct(*SCALARS)), expected)


def test_scalar_columns_as_inputs_of_their_own(scalars):
    def make():
        return lambda a, b, c, d: a + b + c + d

    assert np.array_equal(column(scalars, double(make), *SCALARS), DATA.sum(axis=1))


def test_a_wrong_number_of_columns_is_refused_with_both_numbers(scalars):
    def make():
        return lambda a, b, c: a + b + c

    with pytest.raises(Exception, match="Model expected 3 inputs, but received 4 columns"):
        column(scalars, double(make), *SCALARS)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([[3]], r"Input data does not match expected shape\."),
        ([[4], [4]], "Multiple input_tensor_shapes found"),
    ],
)
def test_shapes_that_do_not_fit_scalar_columns_are_refused(scalars, shapes, reason):
    udf = double(make_row_sum, input_tensor_shapes=shapes)
    with pytest.raises(Exception, match=reason):
        column(scalars, udf, struct(*SCALARS))


@pytest.mark.short
def test_a_tensor_column(tensors):
    udf = double(make_row_sum, input_tensor_shapes=[[4]])
    assert np.array_equal(column(tensors, udf, struct("t1")), DATA.sum(axis=1))
    assert np.array_equal(column(tensors, udf, "t1"), DATA.sum(axis=1))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (None, "Tensor columns require input_tensor_shapes"),
        ([[4], [3]], "Multiple input_tensor_shapes found"),
    ],
)
def test_a_tensor_column_needs_one_shape(tensors, shapes, reason):
    with pytest.raises(Exception, match=reason):
        column(tensors, double(make_row_sum, input_tensor_shapes=shapes), struct("t1"))


def test_two_tensor_columns(tensors):
    def make():
        return lambda one, two: one.sum(axis=1) + two.sum(axis=1)

    udf = double(make, input_tensor_shapes=[[4], [3]])
    expected = DATA.sum(axis=1) + DATA[:, :3].sum(axis=1)
    assert np.array_equal(column(tensors, udf, "t1", "t2"), expected)


@pytest.mark.short
@pytest.mark.parametrize("shapes", [[None, None, None, None, [4]], {4: [4]}], ids=["list", "map"])
def test_scalars_and_a_tensor(scalars, shapes):
    def make():
        return lambda a, b, c, d, t: a + b + c + d + t.sum(axis=1)

    df = scalars.withColumn("t1", array(*SCALARS))
    udf = double(make, input_tensor_shapes=shapes)
    assert np.array_equal(column(df, udf, *SCALARS, "t1"), DATA.sum(axis=1) * 2)


def test_a_tensor_of_two_axes_is_reshaped(tensors):
    def make():
        return lambda matrix: matrix[:, 1, 0] - matrix[:, 0, 1]

    udf = double(make, input_tensor_shapes=[[2, 2]])
    assert np.array_equal(column(tensors, udf, "t1"), DATA[:, 2] - DATA[:, 1])


def make_by_columns():
    return lambda rows: {"a1": rows * 2, "b1": rows * 3}


def make_by_rows():
    return lambda rows: [{"a1": value * 2, "b1": value * 3} for value in rows]


@pytest.mark.short
@pytest.mark.parametrize("make", [make_by_columns, make_by_rows])
def test_several_outputs(scalars, make):
    udf = predict_batch_udf(make, return_type=PAIR, batch_size=5)
    got = columns(scalars, udf, "a")
    assert np.array_equal(got["a1"], DATA[:, 0] * 2)
    assert np.array_equal(got["b1"], DATA[:, 0] * 3)


def make_array_by_columns():
    return lambda x, y: {"x2": x * 2, "y3": y * 3}


def make_array_by_rows():
    return lambda xs, ys: [{"x2": x * 2, "y3": y * 3} for x, y in zip(xs, ys, strict=True)]


@pytest.mark.short
@pytest.mark.parametrize("make", [make_array_by_columns, make_array_by_rows])
def test_outputs_with_an_array(scalars, make):
    udf = predict_batch_udf(
        make, return_type=WITH_ARRAY, input_tensor_shapes=[[], [3]], batch_size=5
    )
    got = columns(scalars, udf, "a", array("b", "c", "d"))
    assert np.array_equal(got["x2"], DATA[:, 0] * 2)
    assert np.array_equal(np.vstack(got["y3"]), DATA[:, 1:] * 3)


def test_a_misshapen_array_in_a_row_is_refused(scalars):
    def make():
        return lambda xs, ys: [
            {"x2": x * 2, "y3": y.reshape(-1, 1)} for x, y in zip(xs, ys, strict=True)
        ]

    udf = predict_batch_udf(
        make, return_type=WITH_ARRAY, input_tensor_shapes=[[], [3]], batch_size=5
    )
    with pytest.raises(Exception, match="must be one-dimensional"):
        columns(scalars, udf, "a", array("b", "c", "d"))


def test_an_array_column_out(scalars):
    def make():
        return lambda rows: np.stack([rows, -rows], axis=1)

    udf = predict_batch_udf(make, return_type=ArrayType(DoubleType()), batch_size=7)
    got = np.vstack(column(scalars, udf, "a"))
    assert np.array_equal(got, np.stack([DATA[:, 0], -DATA[:, 0]], axis=1))


def test_a_single_row(spark):
    def make():
        return lambda one, two: one.sum(axis=1) + two.sum(axis=1)

    udf = predict_batch_udf(
        make, return_type=FloatType(), batch_size=1, input_tensor_shapes=[[4], [3]]
    )
    df = spark.createDataFrame([[[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]], schema=["t1", "t2"])
    assert df.select(udf("t1", "t2")).first()[0] == 9.0


@pytest.mark.short
@pytest.mark.parametrize(
    ("make", "return_type", "reason"),
    [
        (lambda: lambda rows: rows[:-1], DoubleType(), "must have same length as input data"),
        (lambda: lambda rows: rows, PAIR, "must be a dictionary or a list of dictionary"),
        (lambda: lambda rows: {"a1": rows, "z": rows}, PAIR, "b1"),
        (lambda: lambda rows: rows, ArrayType(DoubleType()), "must be two-dimensional"),
        (lambda: lambda rows: rows.reshape(1, -1, 1), DoubleType(), "length|shape"),
    ],
)
def test_results_that_do_not_fit_the_type_are_refused_as_by_pyspark(
    scalars, make, return_type, reason
):
    udf = predict_batch_udf(make, return_type=return_type, batch_size=5)
    with pytest.raises(Exception, match=reason):
        column(scalars, udf, "a")


@pytest.mark.short
def test_texts_in_and_out(spark):
    def make():
        return lambda texts: np.array([text.upper() for text in texts], object)

    udf = predict_batch_udf(make, return_type=StringType(), batch_size=3)
    df = spark.createDataFrame([("car",), ("büs",)], schema=["name"])
    assert sorted(column(df, udf, "name")) == ["BÜS", "CAR"]


@pytest.mark.short
def test_bytes_in(spark):
    def make():
        return lambda images: np.array([len(image) for image in images], np.int32)

    udf = predict_batch_udf(make, return_type=IntegerType(), batch_size=3)
    df = spark.createDataFrame([(bytearray(n),) for n in (5, 100_000)], schema="image binary")
    assert sorted(column(df, udf, "image")) == [5, 100_000]


@pytest.mark.short
def test_what_the_users_code_raises_is_what_spark_reports(scalars):
    def make():
        def predict(rows):
            raise ValueError("the weights are cursed")

        return predict

    with pytest.raises(Exception, match="ValueError: the weights are cursed"):
        column(scalars, double(make), "a")

    def make_failing():
        raise FileNotFoundError("no weights at /nowhere")

    with pytest.raises(Exception, match="no weights at /nowhere"):
        column(scalars, double(make_failing), "a")


@pytest.mark.short
def test_all_tasks_of_a_machine_share_one_load_and_their_batches(scalars, host):
    def make():
        import os

        return lambda rows: np.full(len(rows), os.getpid())

    udf = predict_batch_udf(make, return_type=IntegerType(), batch_size=8)
    pids = column(scalars.repartition(8), udf, "a")
    assert set(pids) == {host.host["pid"]}
    models = host.report()["models"].values()
    found = [
        model
        for model in models
        if model["name"].endswith("one_load_and_their_batches.<locals>.make")
    ]
    assert [model["loads"] for model in found] == [1]
    assert found[0]["frames"] == ROWS


def test_a_function_that_carries_weights_is_refused_with_the_reason():
    weights = np.zeros(9 * 2**20)

    def make():
        return lambda rows: rows * weights[0]

    with pytest.raises(ConfigurationError, match="Spark Connect") as caught:
        double(make)
    assert caught.value.got_bytes > 70 * 2**20


def test_a_function_that_cannot_be_pickled_is_refused():
    import threading

    lock = threading.Lock()

    def make():
        return lambda rows: lock

    with pytest.raises(ConfigurationError, match="cannot be pickled"):
        double(make)


def test_models_of_old_udfs_are_unloaded(scalars, host):
    def make():
        return lambda rows: rows

    for _ in range(5):
        column(scalars, double(make), "a")

    def loaded():
        models = host.report()["models"].values()
        return sum(model["state"] == "ready" for model in models)

    # pyspark's cache of three in each of the Python workers is all that holds them.
    assert wait_until(lambda: loaded() <= 3 * 4)

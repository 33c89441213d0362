import pytest
from children import start
from hypothesis import given
from hypothesis import strategies as st

from moefy import recipe
from moefy.errors import RecipeError


def test_shipped_recipes_load_and_have_a_description():
    names = recipe.shipped()
    assert {"default", "fast", "export"} <= set(names)
    for name, text in names.items():
        assert len(text) > 20
        assert isinstance(recipe.load(name), recipe.Recipe)


@given(
    density=st.floats(0.01, 1.0),
    experts=st.none() | st.integers(1, 512),
    seed=st.integers(0, 2**31),
    router=st.sampled_from(["mlp", "linear"]),
)
def test_round_trip(density, experts, seed, router):
    made = recipe.Recipe(
        density=density,
        seed=seed,
        partition=recipe.PartitionRecipe(experts=experts),
        router=recipe.RouterRecipe(name=router),
    )
    assert recipe.from_dict(recipe.to_dict(made)) == made


def test_override_reads_strings_as_yaml():
    made = recipe.override(
        recipe.Recipe(), {"density": "0.5", "router.name": "linear", "partition.experts": "16"}
    )
    assert (made.density, made.router.name, made.partition.experts) == (0.5, "linear", 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"routr.name": "mlp"}, "did you mean 'router.name'"),
        ({"router.nam": "mlp"}, "did you mean 'router.name'"),
        ({"router": "mlp"}, "unknown recipe key 'router'"),
        ({"density": "0"}, "above 0"),
        ({"density": "yes"}, "expected float"),
        ({"partition.experts": "2.5"}, "expected int or null"),
        ({"partition.experts": "4", "partition.expert_size": "8"}, "exclude each other"),
        ({"partition.shared": "-1"}, "at least 0"),
        ({"router.inputs": "1.5"}, "at most 1, or null"),
        ({"budget.target_kl": "-1"}, "above 0 nats per token"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(RecipeError, match=words):
        recipe.override(recipe.Recipe(), settings)


def test_files_are_strict(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("density: 0.5\nrouter: {name: linear}\n")
    assert recipe.load(file).router.name == "linear"
    file.write_text("densty: 0.5\n")
    with pytest.raises(RecipeError, match="did you mean 'density'"):
        recipe.load(file)
    file.write_text("density: [")
    with pytest.raises(RecipeError, match="not YAML"):
        recipe.load(file)
    with pytest.raises(RecipeError, match="no such file"):
        recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="did you mean 'default'"):
        recipe.load("defalt")


def test_the_package_names_functions_also_after_their_modules_were_imported():
    probe = (
        "import moefy; first = moefy.convert; second = moefy.convert; "
        "import moefy.conversion.convert; assert first is second is moefy.convert and callable(first)"
    )
    done = start(probe).end()
    assert done.returncode == 0, done.stderr

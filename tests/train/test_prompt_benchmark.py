"""The benchmark of merged prompts runs, on a tiny model, and prints a line for each batch."""

from prompt_benchmark import main


def test_it_compares_the_three_variants(tiny_model, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--methods", "milora", "--batches", "1", "2"]
    main([*options, "--dtype", "float32", "--tokens", "2", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["milora", "1"], ["milora", "2"]]
    assert all(float(number) > 0 for line in lines[1:] for number in line.split()[2:5])

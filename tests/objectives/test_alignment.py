import pytest
import torch

from nitp_titan.objectives.alignment import has_next_token, next_implicit_tokens, valid_positions


def _at_end(z_BLD: torch.Tensor, value: float = 0.0, chunks: int = 1) -> torch.Tensor:
    return torch.full((len(z_BLD), chunks, z_BLD.shape[2]), value)


def test_implicit_tokens_stop_at_document_borders():
    z_BLD = torch.tensor([[[1.0], [2.0], [3.0], [10.0], [20.0]]])
    positions_BL = torch.tensor([[0, 1, 2, 0, 1]])
    target_BLD = next_implicit_tokens(z_BLD, _at_end(z_BLD))
    valid_BL = has_next_token(positions_BL)
    assert valid_BL.tolist() == [[True, True, False, True, False]]
    assert target_BLD[valid_BL].flatten().tolist() == [2.0, 3.0, 20.0]


def test_documents_of_one_token_have_no_target():
    assert not has_next_token(torch.zeros(1, 4, dtype=torch.long)).any()


def test_the_last_position_takes_the_state_that_follows_on_another_rank():
    z_BLD, positions_BL = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[4, 5]])
    assert next_implicit_tokens(z_BLD, _at_end(z_BLD, 7.0)).flatten().tolist() == [2.0, 7.0]
    for following_position, valid in ((6, True), (0, False)):
        valid_BL = has_next_token(positions_BL, torch.tensor([following_position]))
        assert valid_BL.tolist() == [[True, valid]]


@pytest.mark.parametrize("chunks", [1, 2])
def test_chunks_of_implicit_tokens_are_parts_of_the_whole(chunks):
    """Cut anywhere, also across the border of two chunks, whose last positions have other successors."""
    z_BLD = torch.arange(8.0).reshape(1, 8, 1)
    following_BRD = torch.tensor([[[100.0], [200.0]]])[:, :chunks]
    whole = [1, 2, 3, 4, 5, 6, 7, 100] if chunks == 1 else [1, 2, 3, 100, 5, 6, 7, 200]
    assert next_implicit_tokens(z_BLD, following_BRD).flatten().tolist() == whole
    for start in range(8):
        for end in range(start + 1, 9):
            part = next_implicit_tokens(z_BLD, following_BRD, start, end)
            assert part.flatten().tolist() == whole[start:end]


def test_without_a_run_every_position_is_compared_with_itself():
    z_BLD = torch.randn(2, 5, 3)
    assert torch.equal(next_implicit_tokens(z_BLD, z_BLD[:, :0]), z_BLD)
    assert torch.equal(next_implicit_tokens(z_BLD, z_BLD[:, :0], 1, 3), z_BLD[:, 1:3])


def test_trained_positions_are_those_that_the_shards_find_valid():
    positions_BL = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    labels_BL = torch.tensor([[5, -100, 5, 5, 5, -100, 5, 5]])
    valid_BL = has_next_token(positions_BL)
    trained_BL = valid_positions(positions_BL, labels_BL, temporal_shift=1, ignore_index=-100)
    assert torch.equal(trained_BL, valid_BL & (labels_BL != -100))
    assert trained_BL.sum().item() == 3
    same_BL = valid_positions(positions_BL, labels_BL, temporal_shift=0, ignore_index=-100)
    assert same_BL.sum().item() == 6

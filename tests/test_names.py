"""Every public name stays importable from where it was before the code was divided into packages."""

import importlib

import pytest

MOVED = {
    "processes": "runs.processes",
    "targets": "experiments.targets",
    "local_attention": "place_attention",  # its old name hid the package local-attention
}
# What the modules defined then. Left out: score_neighbors of layers1d, now lines of the two mixers that used it; TITLES of
# options, machine_rates and images_per_second of targets, which were details; naive_layers, now kernels/reference.py.
NAMES = {
    "allconvnet": """AllConvNet LAYERS2D make_layer2d""",
    "allconvnet_main": """main""",
    "benchmark": """
        Case FAMILIES Family KEYS MEASURED RATIOS UNSEEN add_ratios as_markdown as_text draw_scaling main make_mixers
        measure parse peak_memory seconds_of training_flops with_naive_form write
    """,
    "convit": """
        ACTIVATIONS ConViTBackbone ConViTConfig ConViTLayer ConViTWithLinearClassifier check_whole patch_grid
        resolve_heads
    """,
    "dataset": """
        Batches CIFAR100_NAMES CIFAR10_NAMES DIGIT_NAMES Data DataError DeviceBatches FASHION_NAMES IMAGENET_STATS
        IMAGE_SUFFIXES Images NOISE_STREAM NO_FLIP READERS Recipe STATS Source StreamedBatches balanced_subset
        crop_and_flip gaussian import_torchvision load_data read_idx resize_images stratified_split uniform
    """,
    "layers1d": """
        Attention1d Branching1d BranchingAttention BranchingConv ConvNN1d ConvNNAttention1d MultiHeadAttention
        MultiHeadConv1d MultiHeadConv1dAttention MultiHeadConvNN MultiHeadConvNNAttention MultiHeadKvtAttention
        MultiHeadMixer NeighborSelection PixelShuffle1d PixelUnshuffle1d TokenLayout attend make_convolution
        make_slot_convolution mixing_matrix slot_convolution
    """,
    "layers2d": """Attention2d Branching2d ConvNN2d ConvNNAttention2d""",
    "linear_attention": """
        HybridAttention LinearMixer LinformerAttention NystromformerAttention PerformerAttention RandomFeatures
        identity_values orthogonal_features pseudo_inverse segment_members
    """,
    "local_attention": """
        GatedPositionalSelfAttention LONG MultiHeadLocalAttention MultiHeadMaskedAttention MultiHeadSparseAttention NONE
        NeighborhoodAttention PlacedAttention PlacedPattern TILES_PAY Tiles Tiling kernel_offsets mask_tilings
        neighborhood_tiling pad_tiles product rotate tile_size window_tiling windows
    """,
    "masks": """
        check_grid every_pair generate_1d_attention_mask generate_2d_attention_mask_all_neighbors
        generate_2d_attention_mask_cardinal in_column in_neighborhood in_row in_square is_near is_strided window_reach
        window_start
    """,
    "neighbors": """
        aggregate coordinates find_neighbors find_scored_neighbors gather_neighbors grid_places join_coordinates
        location_neighbors neighbor_scores neighbor_weights random_candidates raster_index spatial_candidates
        weighted_sum
    """,
    "options": """
        AllConvNetConfig BenchmarkConfig CONVIT_SIZES CONVOLUTION_TYPES DATASETS DataConfig DatasetInfo LAYERS1D_NAMES
        LAYERS2D_NAMES MASK_TYPES METRICS NeighborConfig OneLineParser Options PERFORMER_KERNELS PROGRAMS Program
        RESUME_MAY_CHANGE SHUFFLE_PATTERNS SYSTEM Spec TrainConfig VIT_MODELS ViTConfig branch_widths build check_fields
        check_heads check_slots check_window did_you_mean make_parser option parse_options read_values read_yaml
        redefault resolve sequence_grid shuffle_factors specs
    """,
    "processes": """Interrupted ProcessError Processes Signals""",
    "run_experiments": """
        ClusterRun KEYS MEASURES PLOTS_EVERY Point ROOT Running SET_BY_THE_SWEEP Sweep as_cell as_markdown as_word
        check_folder check_points check_values combinations cores draw draw_option finished_summary is_finished is_nan
        label_of last_line lock main make_parser name_points parse_change read_summary read_sweep resolved
        run_on_cluster show_points slurm_parameters submit summarize visible_gpus with_earlier write_summary
    """,
    "targets": """PerImage Target floor_of main make_targets measure_data measure_target""",
    "train_eval": """
        Average LearningRate Meter Metrics NonFiniteLoss Training autocast_for compile_for evaluate fit make_loss
        make_mix make_optimizer new_step run train_one_epoch
    """,
    "utils": """
        COLUMNS DamagedError Progress RunError RunFolder STATE WriteError as_csv as_png atomic_file check_writable
        count_flops count_parameters describe_model device_name draw_curves epoch_line evaluated_weights export_weights
        flops_of load_checkpoint load_state load_weights measure_latency peak_memory pick_device random_state
        remove_temporaries resumable_state save_checkpoint seed_everything seed_process set_random_state versions
        write_atomically
    """,
    "visualize": """
        DRAW as_picture at_least_one at_least_zero default_output draw_attention draw_choice draw_curves draw_masks
        draw_neighbors draw_samples layer_number load_run main make_parser place read_options show_picture title_of
    """,
    "vit": """
        Block LAYERS1D TIMM TORCHVISION ViT init_vit_weights load_vit_weights make_layer1d sinusoidal_positions
    """,
    "vit_main": """main""",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_importable_still(module):
    found = importlib.import_module(MOVED.get(module, module))
    assert not [name for name in NAMES[module].split() if not hasattr(found, name)]

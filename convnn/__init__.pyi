from allconvnet import AllConvNet as AllConvNet
from dataset import load_data as load_data, read_image as read_image
from layers1d import (
    Attention1d as Attention1d,
    BranchingAttention as BranchingAttention,
    BranchingConv as BranchingConv,
    ConvNN1d as ConvNN1d,
    ConvNNAttention1d as ConvNNAttention1d,
    MultiHeadAttention as MultiHeadAttention,
    MultiHeadConv1d as MultiHeadConv1d,
    MultiHeadConv1dAttention as MultiHeadConv1dAttention,
    MultiHeadConvNN as MultiHeadConvNN,
    MultiHeadConvNNAttention as MultiHeadConvNNAttention,
    MultiHeadKvtAttention as MultiHeadKvtAttention,
)
from layers2d import (
    Attention2d as Attention2d,
    Branching2d as Branching2d,
    ConvNN2d as ConvNN2d,
    ConvNNAttention2d as ConvNNAttention2d,
)
from mixers.base import (
    Bias as Bias,
    MultiHeadMixer as MultiHeadMixer,
    PixelShuffle as PixelShuffle,
    PixelUnshuffle as PixelUnshuffle,
    TokenLayout as TokenLayout,
    TokenMixer as TokenMixer,
    attend as attend,
    mixing_matrix as mixing_matrix,
)
from mixers.classical import (
    CrossCovarianceAttention as CrossCovarianceAttention,
    FocalModulation as FocalModulation,
    FourierMixer as FourierMixer,
    GlobalFilterMixer as GlobalFilterMixer,
    MlpMixer as MlpMixer,
)
from mixers.controls import (
    Identity as Identity,
    MeanMixing as MeanMixing,
    Pointwise as Pointwise,
    Pooling as Pooling,
    Pooling2d as Pooling2d,
    RandomMixing as RandomMixing,
)
from mixers.graph import AxialGraphMixer as AxialGraphMixer, GraphConv2d as GraphConv2d, GraphMixer as GraphMixer
from mixers.linear import (
    HybridAttention as HybridAttention,
    LinearAttention as LinearAttention,
    LinformerAttention as LinformerAttention,
    NystromformerAttention as NystromformerAttention,
    PerformerAttention as PerformerAttention,
)
from mixers.local import (
    GatedPositionalSelfAttention as GatedPositionalSelfAttention,
    MultiHeadLocalAttention as MultiHeadLocalAttention,
    MultiHeadMaskedAttention as MultiHeadMaskedAttention,
    MultiHeadSparseAttention as MultiHeadSparseAttention,
    NeighborhoodAttention as NeighborhoodAttention,
)
from mixers.region import (
    BiLevelRoutingAttention as BiLevelRoutingAttention,
    BlockTopKAttention as BlockTopKAttention,
    ContextClusterMixer as ContextClusterMixer,
    PatchToClusterAttention as PatchToClusterAttention,
    ShiftedWindowAttention as ShiftedWindowAttention,
)
from mixers.selection import NeighborSelection as NeighborSelection
from mixers.tables import PerGrid as PerGrid
from models.build import build_network as build_network, load_network_weights as load_network_weights
from models.convit import ConViTConfig as ConViTConfig, ConViTWithLinearClassifier as ConViTWithLinearClassifier
from models.pretrained import load_vit_weights as load_vit_weights
from models.replace import replace_attention as replace_attention
from models.timm import timm_mixer as timm_mixer
from neighbors import (
    aggregate as aggregate,
    coordinates as coordinates,
    find_neighbors as find_neighbors,
    find_scored_neighbors as find_scored_neighbors,
    gather_neighbors as gather_neighbors,
    grid_locations as grid_locations,
    max_neighbors as max_neighbors,
    neighbor_scores as neighbor_scores,
    neighbor_weights as neighbor_weights,
    spatial_candidates as spatial_candidates,
    weighted_sum as weighted_sum,
)
from options.allconvnet import AllConvNetConfig as AllConvNetConfig
from options.data import DataConfig as DataConfig
from options.neighbors import NeighborConfig as NeighborConfig
from options.training import TrainConfig as TrainConfig
from options.vit import ViTConfig as ViTConfig
from runs import DataError as DataError, RunError as RunError, Stopped as Stopped
from train_eval import evaluate as evaluate, train as train
from vit import ViT as ViT

__version__: str

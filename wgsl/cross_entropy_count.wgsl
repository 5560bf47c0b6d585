// One workgroup: number of counted targets.
{# Inside: row < rows, the number of targets; count has one vec4. #}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(local_invocation_index) lid: u32) {
    var counted = 0.0;
    for (var row = lid; row < {{ rows }}u; row += {{ lanes }}u) {
        counted += select(1.0, 0.0, targets_at(row) == {{ ignore }}u);
    }
    let sum = reduce(vec4<f32>(counted, 0.0, 0.0, 0.0), lid);
    if (lid == 0u) {
        count_store(0u, sum);
    }
}

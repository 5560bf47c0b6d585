// One workgroup: number of counted targets and their mean loss.
{# Inside: row < rows, the number of targets and of columns of rows, whose second row begins at its stride. #}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(local_invocation_index) lid: u32) {
    var sums = vec4<f32>();
    for (var row = lid; row < {{ rows }}u; row += {{ lanes }}u) {
        let target_id = targets_at(row);
        let counts = target_id < {{ vocabulary }}u{% if ignore >= 0 %} && target_id != {{ ignore }}u{% endif %};
        sums += vec4<f32>(rows_at(rows_stride + row), select(0.0, 1.0, counts), 0.0, 0.0);
    }
    sums = reduce(sums, lid);
    if (lid == 0u) {
        loss_store(0u, vec4<f32>(sums.x / max(sums.y, 1.0), 0.0, 0.0, 0.0));
        count_store(0u, vec4<f32>(sums.y, 0.0, 0.0, 0.0));
    }
}

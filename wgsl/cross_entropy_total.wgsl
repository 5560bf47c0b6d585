{# All rows by one workgroup; or `each` rows a workgroup, into a row of `parts`; or the sum of those parts. #}
// Number of counted targets and their mean loss. An invocation adds up at most {{ (each + lanes - 1) // lanes }} rows, in blocks of {{ block }}.
{# Inside: row < rows, the number of targets and of columns of rows, whose second row begins at its stride. `parts` has
   a row for each workgroup, and loss and count have one vec4 each. #}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% if from_parts %}
    let sums = parts_load(0u);
{% else %}
    let group = group_id(wid);
    let end = min((group + 1u) * {{ each }}u, {{ rows }}u);
    var sums = vec4<f32>();
    for (var begin = group * {{ each }}u + lid; begin < end; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, end);
        var part = vec4<f32>();
        for (var row = begin; row < stop; row += {{ lanes }}u) {
            let target_id = targets_at(row);
            let counts = target_id < {{ vocabulary }}u{% if ignore >= 0 %} && target_id != {{ ignore }}u{% endif %};
            part += vec4<f32>(rows_at(rows_stride + row), select(0.0, 1.0, counts), 0.0, 0.0);
        }
        sums += part;
    }
    sums = reduce(sums, lid);
{% endif %}
{% if groups > 1 %}
    if (lid == 0u && group < {{ groups }}u) {
        parts_store(group * parts_stride, sums);
        for (var col = 1u; col < parts_stride; col++) {
            parts_store(group * parts_stride + col, vec4<f32>());
        }
    }
{% else %}
    if (lid == 0u) {
        loss_store(0u, vec4<f32>(sums.x / max(sums.y, 1.0), 0.0, 0.0, 0.0));
        count_store(0u, vec4<f32>(sums.y, 0.0, 0.0, 0.0));
    }
{% endif %}
}

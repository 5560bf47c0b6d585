// The sum of every row, `lanes` invocations a row. Padding is zero and may be read.
{# Inside: row is at most the last one, col < used. y has an element for each row. #}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    var sum = vec4<f32>();
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        sum += x_load(row * x_stride + col);
    }
    let total = across(reduce(sum, lid));
    if (wanted < {{ rows }}u && lane == 0u) {
        y_put(row, total);
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < y_stride; i++) {
                y_put(i, 0.0);
            }
        }
    }
}
